"""The command line: one file a command; parse, call the API, render. No logic lives here."""
