"""The benchmark: echobot.py beside the loop of the tutorial and the bare floor."""
