#!/usr/bin/env bash
# Start a run again until it is done:
#
#   runs/loop.sh python train.py config/x.py --init_from=auto
#   runs/loop.sh torchrun --standalone --nproc_per_node=8 train.py config/x.py --init_from=auto
#
# It ends with the run (0), with what another try would only repeat (2: a mistake, 3: not finite),
# with a Ctrl-C or another signal of yours, a batch system's or a closed terminal's, and after three tries in a row
# that lived under a minute: behind torchrun all failures look alike.
set -u
if [ $# -eq 0 ]; then
    echo "usage: $0 COMMAND [ARGS ...]" >&2
    exit 2
fi
child="" stopped="" short=0
trap 'stopped=1' INT  # the terminal has sent it to the run as well
trap 'stopped=1; [ -n "$child" ] && kill -TERM "$child"' TERM HUP USR1 USR2 XCPU
trap '' PIPE  # a lost line of the loop's own must not end it

while true; do
    started=$SECONDS
    "$@" &
    child=$!
    [ -n "$stopped" ] && kill -TERM "$child"  # a signal came before this line
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal ended the wait, not the run
        wait "$child"
        code=$?
    done
    child=""
    case $code in 0 | 2 | 3) exit $code ;; esac
    short=$((SECONDS - started < 60 ? short + 1 : 0))
    if [ $short -ge 3 ]; then
        echo "$0: three short tries in a row; see their output above" >&2
        exit $code
    fi
    sleep 1
    [ -n "$stopped" ] && exit $code
    echo "$0: exit code $code, again" >&2
done
