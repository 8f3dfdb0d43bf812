"""The studies: one question per file; `machinery` runs them."""
