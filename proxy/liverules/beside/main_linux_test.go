package beside

import (
	"testing"

	"github.com/kptrace/kptrace/internal/netns"
)

func TestMain(m *testing.M) { netns.Main(m) }
