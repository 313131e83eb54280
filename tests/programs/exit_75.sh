# A command that stands for a run: it exits with 75 at SIGTERM, and ends after twenty seconds.
trap 'exit 75' TERM
echo ready
for i in {1..200}; do
    sleep 0.1
done
