#include "/usr/include/linux/icmp.h"
