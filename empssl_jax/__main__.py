"""`python -m empssl_jax COMMAND` is the same as `empssl COMMAND`."""

from empssl_jax.command_line import main

if __name__ == "__main__":
    main()
