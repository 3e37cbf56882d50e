package ipvs

import (
	"testing"

	"github.com/kptrace/kptrace/internal/umlguest/guesttest"
)

func TestMain(m *testing.M) { guesttest.Main(m) }
