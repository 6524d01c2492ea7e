#!/bin/sh
# The kernel of bookworm-backports, which has TCX. From wherever the machine has its packages.
set -eu
export DEBIAN_FRONTEND=noninteractive
mirror=$(apt-get indextargets --format "\$(REPO_URI)" | grep -m1 '/debian/$')
echo "deb $mirror bookworm-backports main" > /etc/apt/sources.list.d/backports.list
apt-get update -qq
apt-get install -y -qq --no-install-recommends -t bookworm-backports linux-image-amd64
