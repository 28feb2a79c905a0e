"""Methods side by side on a small pipeline: what each forgets, breaks and costs, at every strength and equal."""
