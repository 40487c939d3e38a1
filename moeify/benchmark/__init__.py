"""What benchmarks are made of: machine, ceilings and timers; for one layer its cases, peers, errors and tables."""
