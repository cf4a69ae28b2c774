"""What an operator sees: status, metrics, checks, the watchdog, the log."""
