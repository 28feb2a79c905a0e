"""What is done with adapters after they were trained."""
