"""The command line of diffexport."""
