"""The command line: ``alpkd``, one module per command."""
