#!/bin/sh
# Reports how full / is, every DISK_REPORT_SECONDS (default 5). A job in any language reports like this: it appends
# {"status": {...}} as one line, in one write, to the file named in HARNESS_JOURNAL. Without a harness: to stdout.

interval=${DISK_REPORT_SECONDS:-5}
journal=${HARNESS_JOURNAL:-/dev/stdout}

report() {
    # Counted from the right: the name of a filesystem, which comes first, may hold blanks.
    df -Pk / | awk 'NR == 2 {
        printf "{\"status\": {\"path\": \"/\", \"total_bytes\": %.0f, ", $(NF - 4) * 1024
        printf "\"used_bytes\": %.0f, \"free_bytes\": %.0f, ", $(NF - 3) * 1024, $(NF - 2) * 1024
        printf "\"used_percent\": %d}}\n", $(NF - 1)
    }' >>"$journal"
}

trap 'exit 0' TERM INT

while :; do
    report
    left=$interval
    while [ "$left" -gt 0 ]; do
        sleep 1 # never longer: a shell obeys a signal only once the command in the foreground has ended
        left=$((left - 1))
    done
done
