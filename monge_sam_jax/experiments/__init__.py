"""What the command line runs: a folder for each command, and `common` for what several share."""
