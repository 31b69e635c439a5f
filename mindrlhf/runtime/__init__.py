"""How a job runs on its hosts: launching, device, signals, supervision, compile cache. It knows no recipe."""
