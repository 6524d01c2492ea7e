#include "/usr/include/linux/tcp.h"
