"""One adapter per kind of pipeline that completes pictures."""
