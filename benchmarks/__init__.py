"""What the method costs: times and memory, measured side by side with plain flow matching."""
