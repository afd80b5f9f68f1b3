"""The warmsync agent. Floors 1 to 7; each imports only from the floors below it."""
