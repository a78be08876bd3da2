"""The five families of small puzzles, one a file: how a problem is drawn, and its worked and terse solutions."""
