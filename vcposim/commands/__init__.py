"""The `vcposim` command: `main` dispatches, one file a subcommand, `figures` draws."""
