"""Concepts as a user gives them: one, completed by what ships, and lists of them."""
