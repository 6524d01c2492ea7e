#include "/usr/include/linux/udp.h"
