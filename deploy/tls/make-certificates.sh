#!/bin/sh
# An authority of your own, and a certificate for each server that Syncward connects to.
#   deploy/tls/make-certificates.sh DIRECTORY db.example.com redis.example.com ...
# Writes DIRECTORY/ca.crt (for every host of Syncward), ca.key (keep it off all of them), and NAME.crt and
# NAME.key for each server. Run it again to renew: the authority stays, certificates are made anew.
set -eu
umask 077
[ $# -ge 2 ] || { echo "usage: $0 DIRECTORY NAME..." >&2; exit 2; }
directory=$1
shift
mkdir -p "$directory"
cd "$directory"

if [ ! -e ca.key ]; then
  openssl ecparam -name prime256v1 -genkey -noout -out ca.key
  openssl req -x509 -new -key ca.key -sha256 -days 3650 -subj "/CN=Syncward links" \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -out ca.crt
fi
for name in "$@"; do
  case $name in *[!a-zA-Z0-9.-]*|-*|"") echo "$name: not a host name" >&2; exit 2 ;; esac
  openssl ecparam -name prime256v1 -genkey -noout -out "$name.key"
  printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
    "extendedKeyUsage=serverAuth" "subjectAltName=DNS:$name" > "$name.ext"
  openssl req -new -key "$name.key" -subj "/CN=$name" |
    openssl x509 -req -CA ca.crt -CAkey ca.key -CAcreateserial -sha256 -days 397 \
      -extfile "$name.ext" -out "$name.crt" 2> "$name.log" || { cat "$name.log" >&2; exit 1; }
  rm -f "$name.ext" "$name.log"
done
chmod 644 ./*.crt
