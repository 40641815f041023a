"""The command line, and the only place that reads configuration files."""
