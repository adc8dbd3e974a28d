"""Results as pages and pictures a person reads."""
