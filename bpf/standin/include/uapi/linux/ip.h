#include "/usr/include/linux/ip.h"
