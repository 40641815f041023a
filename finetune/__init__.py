"""Cell-type annotation from an exported encoder."""
