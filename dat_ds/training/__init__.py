"""The application: a whole run from its config to its record."""
