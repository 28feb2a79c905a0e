"""Methods side by side on one small pipeline: what each forgets, breaks and costs, at every strength and at equal ones."""
