"""What all packages share: errors, command lines, ranks, logs, files, random numbers, timers."""
