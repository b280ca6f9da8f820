#!/bin/sh
# A shell script as a `command` job: it appends to $HARNESS_JOURNAL and notes what it did, as witness.py does.
facts=$CHAOS_FACTS/$1.facts
run=${HARNESS_JOURNAL##*/}
run=${run%%.*}
note() {
    read -r up _ </proc/uptime
    printf '{"f":"%s","t":%s,"run":%s,"pid":%s%s}\n' "$1" "$up" "$run" $$ "$2" >>"$facts"
}
exec 9>>"$CHAOS_FACTS/$1.lock"
until flock -n 9; do # one that was killed itself knows nothing
    [ $? -eq 1 ] && note twice && break
done
note start
trap 'note exit ",\"code\":0"; exit 0' TERM
n=0
lead=
while :; do
    n=$((n + 1))
    if printf "$lead{\"status\":{\"w\":\"sh-$$\",\"n\":%d}}\n" "$n" >>"$HARNESS_JOURNAL"; then
        note said ",\"w\":\"sh-$$\",\"n\":$n"
        lead=
    else
        note refused ",\"w\":\"sh-$$\",\"n\":$n"
        lead='\n'
    fi 2>/dev/null
    [ "$2" = brief ] && [ $n -ge 15 ] && { note exit ',"code":7'; exit 7; }
    sleep 0.3
done
