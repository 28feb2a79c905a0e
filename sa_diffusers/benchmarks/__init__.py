"""What the method costs, measured side by side with the authors' way of doing it, or counted without a GPU."""
