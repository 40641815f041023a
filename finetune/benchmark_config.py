"""Knobs of the referee."""

from dataclasses import dataclass, field

from finetune.config import FinetuneConfig
from finetune.protocol_config import ProtocolConfig

METHODS = (
    "majority",
    "nearest mean",
    "marker scoring",
    "logistic regression",
    "logistic regression L1",
    "CellTypist",
    "SingleR",
    "experts alone",
    "network alone",
    "no pretraining",
    "ours",
)
"""Names of the methods that there are (`finetune.methods`)."""

DEFAULT_METHODS = ("majority", "nearest mean", "logistic regression", "experts alone", "ours")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is compared on which cells."""

    data: str
    """`.h5ad` with raw counts and a label for each cell."""
    output: str
    """Folder for `benchmark.json`, `benchmark.md` and `benchmark.png`."""
    query: str | None = None
    """Labelled `.h5ad` of `cross-data-set`: learn from all of `data`, label this."""
    label_key: str = "cell_type"
    """Column of obs that holds the cell types, in both files."""
    layer: str | None = None
    """Layer that holds the counts, or `raw`; none takes the first of `X`, `layers["counts"]` and
    `raw` that holds counts."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    methods: tuple[str, ...] = DEFAULT_METHODS
    """Names of methods: majority, nearest mean, marker scoring, logistic regression, logistic
    regression L1, CellTypist, SingleR, experts alone, network alone, no pretraining, ours."""
    seeds: tuple[int, ...] = (0,)
    """Each trial is repeated with each seed, of splits as of training."""
    encoder: str = "none"
    """Pretrained encoder of ours: a folder or `models:/name@alias`; `none` takes a fresh one."""
    markers: str | None = None
    """Table of marker genes, PanglaoDB-style, for marker scoring and marker deletion."""
    marker_types: dict[str, str] = field(default_factory=dict)
    """Name of each label in that table, where it differs."""
    name: str | None = None
    """Name of the data set; one of the paper's nine adds published figures, and cell types get the
    names that the paper has for them."""
    train: FinetuneConfig | None = None
    """Settings of ours; none takes the defaults. Data, encoder and output in it do not count."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"methods has {unknown[0]!r}; there are {', '.join(METHODS)}")
        if not self.methods or not self.seeds:
            raise ValueError("methods and seeds must name one or more")
        if (self.protocol.name == "cross-data-set") != (self.query is not None):
            raise ValueError("query names the file to label of cross-data-set, and only of it")
        if self.markers is None:
            if "marker scoring" in self.methods:
                raise ValueError("marker scoring needs a table of markers (--markers)")
            if self.protocol.name == "marker-deletion":
                raise ValueError("marker-deletion needs a table of markers (--markers)")
