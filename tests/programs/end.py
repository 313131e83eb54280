"""Print the arguments, the folder and the like, then end in one of several ways. The first argument
names the way, a function of this file."""

import atexit
import os
import signal
import sys


def exit_without_a_code():
    sys.exit()


def exit_with_7():
    sys.exit(7)


def exit_with_a_sentence():
    sys.exit("a mistake")


def divide_by_zero():
    return 1 / 0


def exit_at_once():
    os._exit(5)


def get_sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


def get_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def get_sigint():
    os.kill(os.getpid(), signal.SIGINT)


def print_at_the_end():
    atexit.register(print, "end")


# to stderr, and with a letter that ASCII lacks: the encoding must be the same, too
print("ж", *sys.argv, os.getcwd(), sys.path[0], __name__, __file__, file=sys.stderr)
print(1)
globals()[sys.argv[1]]()
