"""What every part shares: errors, command lines, ranks, logs, files, seeds, timers."""
