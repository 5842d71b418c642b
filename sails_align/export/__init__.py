"""A finished run for others: checked, merged, described, pushed to the hub, served."""
