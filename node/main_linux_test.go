package node

import (
	"testing"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest"
)

func TestMain(m *testing.M) {
	umlguest.Init()
	netns.Main(m)
}
