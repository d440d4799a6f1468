"""One file a subcommand: its signature, its checks, then one call into the layers below."""
