"""The gauntlet: whole migrations, at which everything is thrown. See docs/reliability.md."""
