"""The command line: parses, calls, returns an exit code."""
