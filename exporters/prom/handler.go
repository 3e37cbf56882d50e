package prom

import (
	"bufio"
	"compress/gzip"
	"io"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Handler serves the metrics, in OpenMetrics where the scraper prefers it. One
// metric that fails does not hide the others.
func (e *Exporter) Handler() http.Handler {
	return compressed(promhttp.HandlerForTransactional(gatherer{e}, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError, EnableOpenMetrics: true, CoalesceGather: true,
		DisableCompression: true,
	}))
}

// compressed has h's answers packed for clients that take gzip, quickly, on
// another processor than the one that writes them: with many endpoints the
// library's way takes longer than everything else together.
func compressed(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Vary", "Accept-Encoding")
		if !acceptsGzip(r.Header.Values("Accept-Encoding")) {
			h.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Encoding", "gzip")
		from, to := io.Pipe()
		packed := make(chan struct{})
		go func() {
			defer close(packed)
			z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
			if err == nil {
				_, err = io.CopyBuffer(z, onlyReader{from}, make([]byte, pieceBytes))
			}
			if err == nil {
				err = z.Close()
			}
			from.CloseWithError(err)
		}()
		out := bufio.NewWriterSize(to, pieceBytes)
		h.ServeHTTP(&packedWriter{ResponseWriter: w, out: out}, r)
		_ = to.CloseWithError(out.Flush())
		<-packed
	})
}

// pieceBytes is what is packed at a time.
const pieceBytes = 256 << 10

// onlyReader keeps io.CopyBuffer from doing without the buffer.
type onlyReader struct{ io.Reader }

// packedWriter sends what is written elsewhere, and the rest to a client.
type packedWriter struct {
	http.ResponseWriter
	out io.Writer
}

func (p *packedWriter) Write(b []byte) (int, error) { return p.out.Write(b) }

// acceptsGzip reads Accept-Encoding (RFC 9110, 12.5.3).
func acceptsGzip(headers []string) bool {
	for _, h := range headers {
		for _, part := range strings.Split(h, ",") {
			coding, weight, _ := strings.Cut(part, ";")
			weight = strings.ReplaceAll(weight, " ", "")
			if c := strings.TrimSpace(coding); c == "gzip" || c == "*" {
				return !strings.HasPrefix(weight, "q=0") || strings.Trim(weight, "q=0.") != ""
			}
		}
	}
	return false
}
