"""What runs in the next step. Plain values and host arrays only: never a device, never text."""
