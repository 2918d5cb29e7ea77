"""Several processes, one mesh: process 0 plans each step and sends its inputs; the others run the same steps. docs/several-hosts.md."""
