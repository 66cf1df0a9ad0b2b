"""Methods: consumers of the hook registry through the bridge's public face."""
