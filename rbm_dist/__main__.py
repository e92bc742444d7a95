"""`python -m rbm_dist …` is the `rbm-dist` command (what a submitted Ray job calls)."""

from rbm_dist.cli import main

if __name__ == "__main__":
    main()
