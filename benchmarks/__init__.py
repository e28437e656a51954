"""Scripts that measure the library. README.md says which script answers which question."""
