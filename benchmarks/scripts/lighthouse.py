"""torchft's lighthouse with its own command line: a file, because it looks for options after a script's name."""

from torchft._torchft import lighthouse_main

if __name__ == "__main__":
    lighthouse_main()
