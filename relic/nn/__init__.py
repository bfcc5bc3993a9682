"""Networks: torch only, single device. Parallelism and training are applied from outside."""
