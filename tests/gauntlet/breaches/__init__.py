"""The design's rules, broken on purpose: the gauntlet must notice. See docs/reliability.md."""
