"""What kind of raw file a path is, by its content first and its suffix second.

The answer is a key of `datastore.formats.FORMATS`; anything else is refused by name, with the
remedy.
"""

import bz2
import gzip
import lzma
import re
import zlib
from pathlib import Path
from typing import Any, Final

import h5py

TABLE_SUFFIX: Final = re.compile(r"\.(csv|tsv|txt)(\.gz)?$", re.IGNORECASE)
CELL_FILE_SUFFIX: Final = re.compile(r"\.(h5ad|h5|loom|rdata|rda|(csv|tsv)(\.gz)?)$", re.IGNORECASE)
_HDF5: Final = b"\x89HDF\r\n\x1a\n"
_OPENERS: Final[dict[bytes, Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_R_DATA: Final = (b"RDX2\n", b"RDX3\n", b"RDA2\n", b"RDA3\n", b"RDB2\n", b"RDB3\n")
_R_OBJECT: Final = (b"X\n\x00\x00\x00", b"A\n2\n", b"A\n3\n")
_MTX_FILE: Final = re.compile(r"^(matrix\.mtx|barcodes\.tsv|features\.tsv|genes\.tsv)(\.gz)?$")


def recognise(path: Path) -> str:
    """Name the format of a file or folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of the formats that are read.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        return _folder_format(path)
    head = _head(path)
    if head.startswith(_HDF5):
        return _hdf5_format(path)
    if head.startswith(_R_DATA):
        return "rdata"
    text = head.lstrip().lower()
    other = ""
    if not head:
        raise ValueError(f"{path} is empty; fetch it again, or leave it out of the sources")
    if head.startswith(b"%%MatrixMarket"):
        raise ValueError(
            f"{path} is the matrix without its genes and cells; name the 10x folder that also "
            "holds features.tsv (or genes.tsv) and barcodes.tsv"
        )
    if head.startswith(_R_OBJECT):
        raise ValueError(f"{path} is an .rds file; in R: sm <- readRDS(file); save(sm, file=...)")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        other = "it begins like a web page, so the download failed: fetch it again"
    elif head.startswith(b"PK") or head[257:262] == b"ustar":
        other = "it is an archive: unpack it and name what is inside"
    elif _is_text(head):
        if TABLE_SUFFIX.search(path.name):
            return "table"
        other = "it is text: rename a table of counts to .csv or .tsv"
    raise ValueError(
        f"{path} cannot be read as {path.suffix or 'raw counts'}: it is another kind of file, or "
        f"cut short; {other or 'fetch it again'}"
    )


def is_source_folder(path: Path) -> bool:
    """Tell whether a folder is itself one source: an AnnData Zarr, or a 10x mtx folder."""
    return _is_zarr(path) or any(_MTX_FILE.match(child.name) for child in path.iterdir())


def is_own_folder(path: Path) -> bool:
    """Tell whether a folder is a cell store of ours, or one that is being written."""
    return (_is_zarr(path) and (path / "manifest.json").exists()) or path.name.endswith(
        (".building", ".appending", ".former")
    )


def _folder_format(path: Path) -> str:
    if is_own_folder(path):
        raise ValueError(f"{path} is a cell store already; name the raw files it was made of")
    if _is_zarr(path):
        return "zarr"
    if is_source_folder(path):
        return "10x mtx"
    raise ValueError(
        f"{path} is a folder, but neither an AnnData Zarr nor a 10x mtx folder, and holds no file "
        "with counts either; name a file"
    )


def _is_zarr(path: Path) -> bool:
    return any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs"))


def _head(path: Path) -> bytes:
    """The first bytes of a file, decompressed if need be."""
    with path.open("rb") as file:
        head = file.read(512)
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            try:
                with opener(path, "rb") as unpacked:
                    return bytes(unpacked.read(512))
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise ValueError(
                    f"{path} cannot be decompressed: it is cut short or damaged; fetch it again"
                ) from error
    return head


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and b"\x00" not in head  # a letter cut in two
    return b"\x00" not in head


def _hdf5_format(path: Path) -> str:
    try:
        with h5py.File(path, "r") as file:
            return _hdf5_layout(file, path)
    except (OSError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as HDF5 ({path.suffix}): it is another kind of file, or cut "
            "short; fetch it again"
        ) from error


def _hdf5_layout(file: h5py.File, path: Path) -> str:
    matrix = file.get("matrix")
    if isinstance(matrix, h5py.Dataset) and {"row_attrs", "col_attrs"} <= set(file):
        return "loom"
    if isinstance(matrix, h5py.Group) and {"barcodes", "features", "indptr"} <= set(matrix):
        return "10x h5"
    groups = [group for group in file.values() if isinstance(group, h5py.Group)]
    if any({"barcodes", "genes", "indptr"} <= set(group) for group in groups):
        return "10x h5"
    if not {"obs", "var"} <= set(file) or not {"X", "layers", "raw"} & set(file):
        raise ValueError(
            f"{path} is an HDF5 file but not an AnnData (obs, var or X missing), nor a 10x or "
            "loom file; write it anew in one of these"
        )
    if not (isinstance(file["obs"], h5py.Group) and isinstance(file["var"], h5py.Group)):
        raise ValueError(
            f"{path} is in the form of anndata older than 0.7; read it with anndata, write it anew"
        )
    return "h5ad"
